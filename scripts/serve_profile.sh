#!/bin/sh
# Serve a model with one of the operator guide's profiles:  scripts/serve_profile.sh PROFILE MODEL [more serve flags]
# Flags given here come last and win. Uses this checkout's .venv unless VLLM_MLX_PYTHON names another interpreter.
set -eu

usage() {
    cat >&2 <<'TEXT'
usage: scripts/serve_profile.sh PROFILE MODEL [serve flags...]

  A  text-default        one request at a time, temperature 0.7, top_p 0.9
  B  text-deterministic  the same bytes on every run
  C  text-tools          tool calls, batching as needed
  D  mllm-default        images, one request at a time, greedy
  E  mllm-correctness    images, batching watched by the divergence monitor
  F  text-json           extraction and JSON, long time-out

environment: VLLM_MLX_PYTHON (interpreter), PORT (8000), LISTEN_MODE (localhost or public)
TEXT
    exit 1
}

[ $# -ge 2 ] || usage
profile=$1
model=$2
shift 2

case "$profile" in
    A|a|text-default)
        flags="--runtime-mode simple --cache-strategy auto --default-temperature 0.7 --default-top-p 0.9" ;;
    B|b|text-deterministic)
        flags="--deterministic" ;;
    C|c|text-tools)
        flags="--runtime-mode auto --cache-strategy auto --enable-auto-tool-choice --tool-call-parser auto" ;;
    D|d|mllm-default)
        flags="--runtime-mode simple --cache-strategy auto --mllm --default-temperature 0.0 --default-top-p 1.0" ;;
    E|e|mllm-correctness)
        flags="--runtime-mode auto --cache-strategy auto --mllm --default-temperature 0.0 --default-top-p 1.0
            --batch-divergence-monitor --batch-divergence-threshold 0.95 --batch-divergence-action serialize" ;;
    F|f|text-json)
        flags="--runtime-mode simple --cache-strategy auto --timeout 900 --default-temperature 0.7 --default-top-p 0.9" ;;
    *)
        echo "serve_profile.sh: unknown profile '$profile'" >&2
        usage ;;
esac

case "${LISTEN_MODE:-localhost}" in
    localhost) listen="--localhost" ;;
    public) listen="--host 0.0.0.0" ;;
    *)
        echo "serve_profile.sh: LISTEN_MODE is localhost or public, not '$LISTEN_MODE'" >&2
        usage ;;
esac

checkout=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${VLLM_MLX_PYTHON:-$checkout/.venv/bin/python}
if ! [ -x "$python" ]; then
    echo "serve_profile.sh: $python cannot be run; run 'make install' first, or set VLLM_MLX_PYTHON" >&2
    exit 1
fi

# The flags above hold no spaces within a word, so splitting them is right.
# shellcheck disable=SC2086
set -- "$python" -m vllm_mlx.cli serve "$model" $listen --port "${PORT:-8000}" $flags "$@"
echo "+ $*"
exec "$@"
