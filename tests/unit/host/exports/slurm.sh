#!/bin/bash
# Submit with sbatch; SBATCH_PARTITION=, SBATCH_ACCOUNT= and the like are as Slurm knows them.
#SBATCH --job-name=trainbox-llm-lora-1a2b3c
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=465
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --output="/home/me/out/slurm.log"
#SBATCH --open-mode=append

set -u
save() { scancel --signal=TERM "$SLURM_JOB_ID"; } # to the containers, not to this script
again=yes
trap save TERM # the time limit comes: the job is requeued, and goes on from its checkpoint
trap 'again=; save' INT # invoke stop
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node have two
CODES=/home/me/out/.ended
rm -f "$CODES"-*
export MASTER_ADDR MASTER_PORT CODES NNODES=2 DOCKER=${DOCKER:-docker}

node=$(cat <<'NODE'
name=trainbox-$SLURM_JOB_ID-$SLURM_PROCID
$DOCKER rm --force "$name" >/dev/null 2>&1 # of an attempt whose node was lost
trap : TERM # the container has it, too
$DOCKER run --rm --name "$name" \
    --init --label org.trainbox=run \
    --user "$(id -u):$(id -g)" --network host --cap-drop ALL --security-opt no-new-privileges --read-only --tmpfs /tmp:rw,exec,nosuid,nodev,mode=1777 --shm-size 2g --pids-limit 4096 --memory 32g --memory-swap 32g --cpus 3.5 \
    --gpus "\"device=${SLURM_STEP_GPUS:-$SLURM_JOB_GPUS}\"" \
    --mount 'type=bind,source=/home/me/it'"'"'s.jsonl,target=/data/train,readonly' \
    --mount type=bind,source=/home/me/out,target=/output \
    --mount type=bind,source=/models/llama,target=/model,readonly \
    --mount type=bind,source=/home/me/out/outputs/plots,target=/workspace/plots \
    --env 'ODD=$HOME $(4) "a"' \
    --env HF_TOKEN \
    --env NNODES --env NODE_RANK="$SLURM_PROCID" --env MASTER_ADDR --env MASTER_PORT \
    registry.example:5000/trainbox/llm-lora@sha256:abababababababababababababababababababababababababababababababab train
code=$?
echo "$code" >"$CODES-$SLURM_PROCID"
exit "$code"
NODE
)
srun --kill-on-bad-exit=0 --wait=300 bash -c "$node" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends the waiting, not the step
wait "$step"
code=$?
trap - TERM INT

# srun tells the highest code alone: of a node that fails before they meet, the others are killed.
hopeless() { cat "$CODES"-* 2>/dev/null | grep -qxE '2|3|6'; }
spent() { grep -q '"place": "budget\.' /home/me/out/result.json 2>/dev/null; }
killed() { [ "$code" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }
if [ "$again" ] && ! hopeless && ! spent && { [ "$code" = 75 ] || killed; }; then
    echo "ended with exit code $code: requeued, to go on from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$CODES"-*
exit "$code"
