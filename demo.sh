#!/usr/bin/env bash
# Train a small vision transformer by DINO on photographs that are installed with the requirements, and hold its features
# against raw pixels and against the same network untrained. No GPU and no data needed. ./demo.sh [OUTPUT_DIR]
set -euo pipefail
output=${1:-runs/demo}
case $output in /*) ;; *) [ $# -eq 0 ] || output=$PWD/$output ;; esac
cd "$(dirname "$0")"
. .ci/venv.sh requirements.txt

# Threads that wait for one another sleep instead of spinning: the loader's processes need the cores too. (Four times as
# fast where something else runs beside.)
export OMP_WAIT_POLICY=PASSIVE
"$python" main_dino.py --config recipes/demo.yaml --output_dir "$output"
"$python" eval_knn.py --arch vit_nano --patch_size 8 --image_size 48 --nb_knn 5 10 20 50 --num_workers 2 \
  --baselines true --pretrained_weights "$output/checkpoint.pth"
