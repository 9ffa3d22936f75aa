#!/usr/bin/env bash
# Lint, and the whole test suite with its coverage. Words after ./test.sh go to pytest: ./test.sh -m 'not slow' -k loss
set -euo pipefail
cd "$(dirname "$0")"
. .ci/venv.sh requirements-dev.txt

"$python" -m ruff check .
"$python" -m ruff format --check .
if [ $# -gt 0 ]; then
  exec "$python" -m pytest "$@"
fi
modules=(
  main_dino utils vision_transformer dino_data dino_images dino_shards health knn hubconf export report
  eval_knn eval_linear eval_video_segmentation eval_image_retrieval eval_copy_detection
  visualize_attention video_generation run_with_submitit benchmark
)
"$python" -m pytest -n 3 --dist loadgroup --durations 8 --cov-report= "${modules[@]/#/--cov=}"
for module in "${modules[@]}"; do
  covered=$("$python" -m coverage report --include="$module.py" --format=total)
  echo "$module.py: $covered % of lines covered"
  [ "$covered" -ge 90 ] || { echo "error: less than the 90 % that are wanted" >&2; exit 1; }
done
