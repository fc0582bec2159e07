#!/bin/sh
# Serve a model for one client application:  scripts/serve_client_profile.sh CLIENT MODEL [more serve flags]
# Picks the serve profile that suits the client, and the API key that its settings ask for. A key given by --api-key or
# VLLM_MLX_CLIENT_API_KEY wins.
set -eu

usage() {
    cat >&2 <<'TEXT'
usage: scripts/serve_client_profile.sh CLIENT MODEL [serve flags...]

  text     semachat  open-webui-text  goose-text  cherry-studio  chatbox  librechat  witsy  jan  anythingllm  boltai
           generic-openai
  tools    goose-tools
  images   semachat-mllm  open-webui-mllm  generic-mllm

In the client: base URL http://localhost:8000/v1, model "default", and the API key that is printed here.
environment: as for serve_profile.sh, and VLLM_MLX_CLIENT_API_KEY
TEXT
    exit 1
}

[ $# -ge 2 ] || usage
client=$1
model=$2
shift 2

case "$client" in
    semachat) profile=text-default key=semachat-local ;;
    semachat-mllm) profile=mllm-default key=semachat-local ;;
    open-webui-text) profile=text-default key=openwebui-local ;;
    open-webui-mllm) profile=mllm-default key=openwebui-local ;;
    goose-text) profile=text-default key=goose-local ;;
    goose-tools) profile=text-tools key=goose-local ;;
    cherry-studio) profile=text-default key=cherrystudio-local ;;
    chatbox|librechat|witsy|jan|anythingllm|boltai) profile=text-default key=$client-local ;;
    generic-openai) profile=text-default key=local-client ;;
    generic-mllm) profile=mllm-default key=local-client ;;
    *)
        echo "serve_client_profile.sh: unknown client '$client'" >&2
        usage ;;
esac

for word in "$@"; do
    case "$word" in
        --api-key|--api-key=*|--api-key-file|--api-key-file=*) key= ;;
    esac
done

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
if [ -n "$key" ]; then
    key=${VLLM_MLX_CLIENT_API_KEY:-$key}
    echo "API key for $client: $key"
    # Through the environment: a key on the command line shows in the process list.
    VLLM_MLX_API_KEY=$key
    export VLLM_MLX_API_KEY
fi
exec "$here/serve_profile.sh" "$profile" "$model" "$@"
