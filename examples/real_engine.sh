#!/usr/bin/env bash
# Starts an SGLang server without and with mla-patch. Compares greedy tokens and the time per output token, and shows
# what the plugin replaced.
#
#   bash examples/real_engine.sh MODEL [more arguments of the server, such as --kv-cache-dtype fp8_e4m3 --tp 8]
#
# Variables: TOKENS=8192 (length of a prompt), NEW=64 (tokens to generate), REQUESTS=1 (at the same time), PORT=30000,
# PYTHON=python, OUT (a folder for logs, answers and reports), SECONDS_TO_START=1200.
set -euo pipefail
set -m # gives the server a process group of its own, so that its children end with it

[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
url=http://127.0.0.1:${PORT:=30000}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
server=("$python" -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "$PORT"
  --attention-backend triton "$@")
ask=("$python" "$here/ask.py" "$url" --tokens "${TOKENS:-8192}" --new "${NEW:-64}" --requests "${REQUESTS:-1}")
pid=

stop() {
  [ -n "$pid" ] || return 0
  kill -TERM -- "-$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  pid=
}
trap stop EXIT

start() { # NAME COMMAND...
  local name=$1 waited=0
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 &
  pid=$!
  until "$python" -c "import urllib.request as u; u.urlopen('$url/health', timeout=5)" 2>/dev/null; do
    if ! kill -0 "$pid" 2>/dev/null || [ $((waited += 1)) -gt "${SECONDS_TO_START:-1200}" ]; then
      tail -n 20 "$out/$name.log" >&2
      echo "the server did not start; its log is $out/$name.log" >&2
      exit 1
    fi
    sleep 1
  done
}

start host env -u MLA_PATCH "${server[@]}"
"${ask[@]}" --save "$out/host.json"
stop

export MLA_PATCH_REPORT=$out/report
start patched "$python" -m mla_patch run -f decode=on -- "${server[@]}"
"${ask[@]}" --save "$out/patched.json" --against "$out/host.json"
sleep 1 # a process writes its report four times a second
"$python" -m mla_patch status "$MLA_PATCH_REPORT" || true # exit status 1 means a finding, which it has printed
echo "logs, answers and reports: $out"
