#!/usr/bin/env bash
# Serves a run's policy with its drafter on port 8000 of this machine: serve.sh RUN [--print]
set -euo pipefail
run=${1:?usage: serve.sh RUN [--print]}
shift
vllm=.venv-peers/bin/vllm # made by `make peers`
[ -x "$vllm" ] || vllm=vllm
exec paceline serve "$run" --vllm "$vllm" "$@"
