#!/usr/bin/env bash
# Asks the server for a completion: ask.sh [PROMPT]
set -euo pipefail
url=http://127.0.0.1:8000/v1
model=$(curl --silent --fail "$url/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
python3 -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "prompt": sys.argv[2], "max_tokens": 64}))' \
    "$model" "${1:-12 + 30 =}" \
    | curl --silent --fail "$url/completions" --header "Content-Type: application/json" --data @-
