#!/usr/bin/env bash
# One pod of a training: a worker for each of its GPUs. k8s/train.yaml runs it in every pod of an
# indexed Job; the arguments go to dist_dml.train.
#
# The pod's exit code is what the Job decides by: 75 (stopped and saved: start it again), 2 (a
# mistake that no retry mends), 1 (failed). That is why no launcher stands between: torchrun exits
# with 1 whatever its workers say. SIGTERM goes to the workers at once, and they have as long as the
# pod has.
#
# Environment:
#   JOB_COMPLETION_INDEX   of this pod, set by Kubernetes
#   NUM_PODS               of the Job
#   WORKERS_PER_POD        GPUs of the pod; on CPUs as many as you like
#   MASTER_ADDR            name of pod 0
#   MASTER_PORT            a port of it
set -uo pipefail

for name in JOB_COMPLETION_INDEX NUM_PODS WORKERS_PER_POD MASTER_ADDR MASTER_PORT; do
    if [[ -z ${!name:-} ]]; then
        echo "train_pod.sh: error: $name is not set; k8s/train.yaml sets it" >&2
        exit 2
    fi
done
export MASTER_ADDR MASTER_PORT
export WORLD_SIZE=$((NUM_PODS * WORKERS_PER_POD)) LOCAL_WORLD_SIZE=$WORKERS_PER_POD

# From the first moment on: a pod may be asked to go while it starts. Workers finish their step and
# save it.
workers=()
interrupted=
# shellcheck disable=SC2329  # The trap below calls it.
stop() {
    interrupted=1
    # Nothing has been trained: what comes after a pod that has saved is right here as well.
    ((${#workers[@]})) || exit 75
    kill -TERM "${workers[@]}" 2>/dev/null
}
trap stop TERM INT

# Pods start in any order, and the name is known once pod 0 has an address.
for ((tries = 150; tries > 0; tries--)); do
    getent hosts "$MASTER_ADDR" >/dev/null && break
    # In the background, as a signal waits for what is in the foreground.
    sleep 2 &
    wait $!
done

for ((i = 0; i < WORKERS_PER_POD; i++)); do
    RANK=$((JOB_COMPLETION_INDEX * WORKERS_PER_POD + i)) LOCAL_RANK=$i \
        python -m dist_dml.train "$@" &
    workers+=($!)
done

# All workers end within seconds when one does. A mistake tells most, then that they have saved.
result=0
for worker in "${workers[@]}"; do
    while :; do
        interrupted=
        wait "$worker"
        code=$?
        # The signal ended `wait`, not the worker.
        [[ $interrupted ]] || break
    done
    if ((code == 2 || result == 0 || (code == 75 && result != 2))); then
        result=$code
    fi
done
exit "$result"
