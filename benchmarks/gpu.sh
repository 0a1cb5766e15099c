#!/usr/bin/env bash
# Every measurement that wants a GPU, in one command: DINOv2-large + Gemma-2-2B at full size with random weights.
#
#   benchmarks/gpu.sh                            on a CUDA GPU with 40 GB or more; figures go to runs/benchmarks-gpu
#   benchmarks/gpu.sh --output-dir DIR           ... or there
#   benchmarks/gpu.sh --tiny --device cpu        the same commands with tiny models, to see that they run
#
# Training at batch sizes 8 and 16 (ours, with one thing changed at a time, and the baselines), larger batches with their
# share of the matrix-multiply peak and torch.profiler's table of a step, peak memory by batch size (each peak in a
# process of its own), and captioning 64 pictures x 40 tokens. PYTHON names the interpreter (python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python}"
device=cuda
output=runs/benchmarks-gpu
tiny=()
batches=(8 16)
large_batches=(32 64 128)
memory=(--batch-sizes 8 16 32 64)
captions=(--max-new-tokens 40 --batch-size 64 --images 256 --compile)
while (($#)); do
  case "$1" in
    --tiny)
      tiny=(--tiny) batches=(8) large_batches=(10)
      memory=(--batch-sizes --variants ours)
      captions=(--max-new-tokens 4 --batch-size 4)
      shift ;;
    --device) device="${2:?--device needs a name}"; shift 2 ;;
    --output-dir) output="${2:?--output-dir needs a folder}"; shift 2 ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "benchmarks/gpu.sh: unknown option $1 (--tiny, --device NAME, --output-dir DIR)" >&2; exit 2 ;;
  esac
done
mkdir -p "$output"

run() {  # NAME BENCHMARK OPTIONS...: its table to the screen and NAME.txt, its figures to NAME.json
  local name="$1" benchmark="$2"
  shift 2
  echo "== $name"
  "$python" -m "benchmarks.$benchmark" --device "$device" ${tiny[@]+"${tiny[@]}"} --json "$output/$name.json" "$@" |
    tee "$output/$name.txt"
}

for size in "${batches[@]}"; do
  run "train-batch-$size" train_step --system dinov2-gemma --batch-size "$size" \
    --variants ours no-feature-cache full-logits like-lengths hugging-face published clipcap
done
for size in "${large_batches[@]}"; do
  run "train-batch-$size" train_step --system dinov2-gemma --batch-size "$size" --captions "$((2 * size))" \
    --variants ours like-lengths --profile "$output/profile-batch-$size.txt"
done
run memory memory --systems dinov2-gemma "${memory[@]}"
run caption caption --system dinov2-gemma --num-beams 1 "${captions[@]}"
echo "== figures in $output"
