#!/usr/bin/env bash
# Two trainings that differ in one thing and see equally many rows; Best-of-16 on the same candidates, with the difference
# paired over problems.
#
#   recipes/mini/compare.sh tree_against_none         does packing the rows of a tree cost quality? On the shipped trees
#   recipes/mini/compare.sh adaptive_against_fixed    do labels of adaptive rollouts, half as many, against 16 at each prefix?
#
# Made for one GPU, on which both trainings run at once: TRAIN='--tf32 true --dataloader_num_workers 4'. With the CANDIDATES of
# another run, and trees for adaptive_against_fixed in OUTPUT/trees, a comparison takes 3 minutes on an H200. On two CPU cores
# JOBS=1 STEPS=100 BATCH=16 took 22 minutes, with the CANDIDATES of another run, cut to its first 150 problems a split.
set -euo pipefail
comparison=${1:?usage: compare.sh tree_against_none|adaptive_against_fixed}
first=${comparison%_against_*} second=${comparison#*_against_}
out=${OUTPUT:-outputs/$comparison}
policy=${POLICY:-mini-policy}
here=$(dirname "$0")
annotated=mini:annotation:${PROBLEMS:-2000}:6000  # none of the shipped trees' problems
mkdir -p "$out/rows" "$out/trees"
export TOKENIZERS_PARALLELISM=false

both() {  # COMMAND FIRST; COMMAND SECOND: at once, or one after the other with JOBS=1
  if [ "${JOBS:-2}" = 1 ]; then "$1" "$first"; "$1" "$second"; return; fi
  "$1" "$first" & local one=$!
  "$1" "$second" & local other=$!
  wait $one && wait $other
}
annotate() {  # adaptive: the same problems with half the rollouts
  local budget=${BUDGET:-160} adaptive=false
  [ "$1" != adaptive ] || { budget=$((budget / 2)); adaptive=true; }
  [ -e "$out/trees/$1.parquet" ] || python3 -m mm_prm.cli annotate --config "$here/annotate.yaml" --policy "$policy" \
    --problems "$annotated" --num_rollouts 16 --rollout_budget $budget --adaptive_rollouts $adaptive \
    --output "$out/trees/$1.parquet" --output_json "$out/trees/$1.json"
}
train() {
  local packing=tree problems=$annotated
  [ "$1" != none ] || packing=none
  [ "$comparison" = adaptive_against_fixed ] || problems=mini:annotation:2000
  python3 -m mm_prm.train --config "$here/train.yaml" --problems "$problems" --model "$policy" --packing $packing \
    --rows "$out/rows/$1.parquet" --output_dir "$out/prm/$1" --max_steps "${STEPS:-500}" --seed "${SEED:-0}" \
    --per_device_train_batch_size "${BATCH:-512}" ${TRAIN:-}
}
score() { python3 "$here/measure.py" score --directory "$out" --name "$1" --model "$out/prm/$1"; }

if [ "$comparison" = adaptive_against_fixed ]; then
  both annotate
  for name in $first $second; do
    python3 -m mm_prm.cli rows --trees "$out/trees/$name.parquet" --output "$out/rows/$name.parquet"
  done
else
  trees=$(python3 -c 'from mm_prm.embedded import embedded_path; print(embedded_path("mini_trees.parquet"))')
  python3 -m mm_prm.cli rows --trees "$trees" --output "$out/rows/$first.parquet"
  cp "$out/rows/$first.parquet" "$out/rows/$second.parquet"
fi
python3 "$here/equal_rows.py" ${ROWS:+--most "$ROWS"} "$out/rows/$first.parquet" "$out/rows/$second.parquet"
both train
if [ -n "${CANDIDATES:-}" ]; then
  mkdir -p "$out/candidates" && cp "$CANDIDATES"/*.json "$out/candidates/"
else
  python3 "$here/measure.py" candidates --directory "$out" --policy "$policy" --scale "${SCALE:-1}"
fi
both score
python3 "$here/measure.py" compare --directory "$out" --name "$first" --against "$second"
