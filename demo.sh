#!/usr/bin/env bash
# Train a small ViT with DINO on photographs that are installed with the requirements. Then draw its attention maps, and
# compare its k-NN accuracy with raw pixels and with the untrained network. Needs no GPU and no data.
# Usage: ./demo.sh [OUTPUT_DIR]
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit ;;
  -*) echo "error: unknown option $1 (usage: ./demo.sh [OUTPUT_DIR])" >&2; exit 2 ;;
esac
output=${1:-runs/demo}
case $output in /*) ;; *) [ $# -eq 0 ] || output=$PWD/$output ;; esac
cd "$(dirname "$0")"
. .ci/venv.sh requirements.txt

# Waiting threads sleep instead of spinning, because the loader processes need the cores too. This is four times as fast
# on a machine with other load.
export OMP_WAIT_POLICY=PASSIVE
"$python" main_dino.py --config recipes/demo.yaml --output_dir "$output"
"$python" visualize_attention.py --pretrained_weights "$output" --image_size 320 --output_dir "$output/attention"
"$python" eval_knn.py --pretrained_weights "$output" --image_size 64 --nb_knn 5 10 20 50 --num_workers 2 \
  --baselines true
echo "attention maps: $output/attention/overview.png"
