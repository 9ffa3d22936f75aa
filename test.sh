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
for module in "${modules[@]}"; do
  covered=$("$python" -m coverage report --include="$module.py" --format=total)
  echo "$module.py: $covered % of lines covered"
  [ "$covered" -ge 90 ] || { echo "error: less than 90 % of $module.py is covered" >&2; exit 1; }
done
