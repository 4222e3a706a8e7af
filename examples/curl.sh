#!/usr/bin/env bash
# The same with curl alone: upload, train, wait, draw. Needs a running service: difffit up
#   examples/curl.sh examples/mnist_digits_32.zip digit-3 60
set -euo pipefail

archive=${1:?usage: curl.sh ARCHIVE CLASS [STEPS]}
prompt=${2:?usage: curl.sh ARCHIVE CLASS [STEPS]}
steps=${3:-\"auto\"}
url=${DIFFFIT_URL:-http://127.0.0.1:8321}
key=${DIFFFIT_API_KEY:-$(cat .difffit/api_key)}

call() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer $key" "$@"; }
field() { python3 -c 'import functools, json, sys
print(functools.reduce(lambda v, k: v[int(k)] if isinstance(v, list) else v[k], sys.argv[1:], json.load(sys.stdin)))' "$@"; }

file=$(call "$url/v1/files" -F purpose=fine-tune -F "file=@$archive" | field id)
base=$(call "$url/v1/models" | field data 0 id)
echo "uploaded $file; adapting $base"

job=$(call "$url/v1/fine_tuning/jobs" -H 'Content-Type: application/json' -d "{
  \"model\": \"$base\", \"training_file\": \"$file\",
  \"method\": {\"type\": \"difffit\", \"difffit\": {\"hyperparameters\": {\"steps\": $steps}}}
}" | field id)
echo "created $job"

call --no-buffer -H 'Accept: text/event-stream' "$url/v1/fine_tuning/jobs/$job/events" | grep --line-buffered '^data:'

model=$(call "$url/v1/fine_tuning/jobs/$job" | field fine_tuned_model)
call "$url/v1/images/generations" -H 'Content-Type: application/json' -d "{
  \"model\": \"$model\", \"prompt\": \"$prompt\", \"seed\": 0, \"response_format\": \"b64_json\"
}" | field data 0 b64_json | base64 --decode > curl.png
echo "$model drew curl.png"
