#!/bin/sh
# Put another of MLX's Linux backends into an environment:  scripts/use_mlx_backend.sh PYTHON cuda12|cuda13|cpu
# The backends' packages hold files of the same name, so the old one goes before the new one comes.
set -eu

python=$1
backend=$2
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
case "$backend" in
    cpu) package=mlx-cpu ;;
    cuda12) package=mlx-cuda-12 ;;
    cuda13) package=mlx-cuda-13 ;;
    *) echo "use_mlx_backend.sh: the backend is cpu, cuda12 or cuda13, not '$backend'" >&2; exit 1 ;;
esac
version=$(sed -n "s/^$package==//p" "$here/constraints.txt")

if command -v uv >/dev/null 2>&1; then
    uninstall="uv pip uninstall --quiet --python $python"
    install="uv pip install --quiet --python $python -c $here/constraints.txt"
else
    uninstall="$python -m pip uninstall --quiet --yes"
    install="$python -m pip install --quiet --disable-pip-version-check -c $here/constraints.txt"
fi
$uninstall mlx-cpu mlx-cuda-12 mlx-cuda-13 2>/dev/null || true
$install "$package==$version" "mlx[$backend]"
