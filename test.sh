#!/usr/bin/env bash
# Lint, then the whole test suite with its coverage. Arguments are passed on to pytest: ./test.sh -m 'not slow' -k loss
set -euo pipefail
cd "$(dirname "$0")"
. .ci/venv.sh requirements-dev.txt

"$python" -m ruff check .
"$python" -m ruff format --check .
if [ $# -gt 0 ]; then
  exec "$python" -m pytest "$@"
fi
modules=(*.py)
modules=("${modules[@]%.py}")
"$python" -m pytest -n 3 --dist loadgroup --durations 8 --cov-report= "${modules[@]/#/--cov=}"
"$python" -m coverage report | awk -v files="${#modules[@]}" '
  $1 ~ /\.py$/ { print; count++; if ($NF + 0 < 90) { print "error: less than 90 % of " $1 " is covered"; bad = 1 } }
  END { if (count != files) { print "error: the report has " count " of " files " files"; bad = 1 }; exit bad }'
