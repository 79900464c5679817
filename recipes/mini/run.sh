#!/usr/bin/env bash
# The whole mini study on one page: perception, policy, annotation, PRM, evaluation, table.
#
#   recipes/mini/run.sh                                    everything, with the policy trained anew
#   POLICY=mini-policy recipes/mini/run.sh annotation rows prm evaluation table      from the shipped policy on
#   POLICY=mini-policy recipes/mini/run.sh shipped_trees rows prm evaluation table   from the shipped trees on
#
# Made for one or two GPUs and a dozen cores each. PROBLEMS, JOBS, TRAIN and SCALE make it smaller: with
# PROBLEMS=24 JOBS=1 TRAIN='--max_steps 2 --per_device_train_batch_size 4' SCALE=0.01 it passes on two cores.
# On GPUs: TRAIN='--tf32 true --dataloader_num_workers 2 --dataloader_persistent_workers true'
set -euo pipefail
out=${OUTPUT:-outputs/mini}
policy=${POLICY:-$out/policy}
problems=${PROBLEMS:-6000}
jobs=${JOBS:-8}
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}
started_jobs=0
stages=${*:-policy annotation rows prm evaluation table}
here=$(dirname "$0")
mkdir -p "$out/trees" "$out/logs"
export TOKENIZERS_PARALLELISM=false

run() {  # NAME COMMAND…: in the background, output to a log, at most $jobs at once, on the GPUs in turn
  local name=$1; shift
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do sleep 0.2; done
  [ "$gpus" = 0 ] || export CUDA_VISIBLE_DEVICES=$((started_jobs++ % gpus))
  ( "$@" > "$out/logs/$name.log" 2>&1 || { echo "failed: $name, see $out/logs/$name.log"; tail -5 "$out/logs/$name.log"; exit 1; } ) &
}
finish() {  # waits for all of them, and fails if one did
  local status=0 job
  for job in $(jobs -p); do wait "$job" || status=1; done
  return $status
}
train() {  # NAME ROWS ARGUMENTS…
  local name=$1 rows=$2; shift 2
  run "train_$name" python3 -m mm_prm.train --config "$here/train.yaml" --problems "mini:annotation:$problems" \
    --model "$policy" --rows "$out/rows/$rows.parquet" --output_dir "$out/prm/$name" "$@" ${TRAIN:-}
}

for stage in $stages; do
  started=$SECONDS
  case $stage in
    policy)
      python3 "$here/train_policy.py" --output_dir "$out/policy" --workers "${WORKERS:-15}" ;;
    annotation)
      share=$(( (problems + jobs - 1) / jobs ))
      for strategy in omegaprm flat; do
        for ((job = 0; job < jobs; job++)); do
          run "annotate_${strategy}_$job" python3 -m mm_prm.cli annotate --config "$here/annotate.yaml" \
            --strategy $strategy --policy "$policy" --problems "mini:annotation:$share:$((job * share))" \
            --output "$out/trees/$strategy.$job.parquet" --output_json "$out/trees/$strategy.$job.json"
        done
      done
      finish ;;
    shipped_trees)
      cp "$here"/trees/*.parquet "$out/trees/"
      cp "$(python3 -c 'from mm_prm.embedded import embedded_path; print(embedded_path("mini_trees.parquet"))')" \
        "$out/trees/omegaprm.0.parquet" ;;
    rows)
      python3 "$here/make_rows.py" "$out" ;;
    prm)
      [ -e "$out/init" ] || python3 "$here/model.py" "$out/init"
      # every optimizer step sees about 120 trees, whatever it sees of each
      train both both --per_device_train_batch_size 1024
      train both_hard both --per_device_train_batch_size 1024 --label_mode hard
      train soft omegaprm
      train hard omegaprm --label_mode hard
      train flat flat
      train flat_hard flat --label_mode hard
      train measured measured
      train soft_lr_2e-4 omegaprm --learning_rate 2.0e-4
      train quarter quarter
      train outcome outcome
      train scratch omegaprm --model "$out/init" --freeze_vision_tower false
      finish ;;
    evaluation)
      python3 "$here/measure.py" candidates --directory "$out" --policy "$policy" --scale "${SCALE:-1}"
      for name in both both_hard soft hard flat flat_hard measured soft_lr_2e-4 quarter outcome scratch; do
        run "score_$name" python3 "$here/measure.py" score --directory "$out" --name $name --model "$out/prm/$name"
      done
      finish ;;
    table)
      python3 "$here/measure.py" table --directory "$out" --output "${TABLE:-$here}" ;;
  esac
  echo "$stage: $((SECONDS - started)) s"
done
