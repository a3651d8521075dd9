#!/usr/bin/env bash
# Starts a Ray head that only this machine reaches, and only with a token. It stays in the
# foreground; Ctrl-C or SIGTERM ends it with all that it started. (`ray stop` ends every Ray of the
# machine, also those of others.) Further arguments go to `ray start`:
#
#     cluster/ray_head.sh --num-cpus 8
#
# Jobs: whoever may submit one runs code here as this user. From this machine, or through a tunnel
# (`ssh -N -L 8265:127.0.0.1:8265 HEAD`, and a copy of the token file with mode 600):
#
#     export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token
#     ray job submit --address http://127.0.0.1:8265 --working-dir . -- \
#         python -m dist_dml.train --config my.yaml
#
# RAY_AUTH_MODE is needed there as well: Ray's clients send no token unless told.
#
# Environment:
#   DIST_DML_RAY_HOST            address to listen on (127.0.0.1). Other machines join by one that
#                                they reach, with the same token file; messages are not encrypted:
#                                a private network, or RAY_USE_TLS=1 with certificates.
#   DIST_DML_RAY_PORT            of the head (6379); Ray refuses 10002 to 19999
#   DIST_DML_RAY_DASHBOARD_PORT  of dashboard and jobs (8265), on the loopback in any case
#   RAY_AUTH_TOKEN_PATH          the token's file (~/.ray/auth_token), made if there is none
set -euo pipefail

host=${DIST_DML_RAY_HOST:-127.0.0.1}
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
# It would count instead of the file, and be in the environment of every job.
unset RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
# A head whose helpers have not answered after 30 s ends itself: too short for a busy machine, or
# for packages on a network's file system.
export RAY_agent_register_timeout_ms=${RAY_agent_register_timeout_ms:-300000}

fail() {
    echo "ray_head.sh: error: $1" >&2
    exit 2
}

# The virtual environment of this checkout first, then the user's path.
ray=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/ray
[[ -x $ray ]] || ray=$(command -v ray) || fail "ray is not installed; pip install 'dist_dml[tune]'"

if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    (
        umask 077
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        # Under a name of its own first: another head that starts now finds a whole token or none.
        temporary=$(mktemp "$RAY_AUTH_TOKEN_PATH.XXXXXX")
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$temporary"
        mv "$temporary" "$RAY_AUTH_TOKEN_PATH"
    ) || fail "cannot write the token's file $RAY_AUTH_TOKEN_PATH; set RAY_AUTH_TOKEN_PATH"
    echo "ray_head.sh: new token in $RAY_AUTH_TOKEN_PATH"
fi
case $(stat -L -c %a "$RAY_AUTH_TOKEN_PATH") in
    600 | 400) ;;
    *) fail "others may read $RAY_AUTH_TOKEN_PATH: delete it for a new one, or chmod 600 it" ;;
esac

case $host in
    127.0.0.1 | localhost)
        host=127.0.0.1
        # Ray replaces a loopback address by the machine's own, and listens there, unless it takes
        # the system for one that it keeps on the loopback. Its workers inherit the variable.
        export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
        ;;
    *)
        echo "ray_head.sh: Ray listens on $host; its messages are not encrypted" >&2
        ;;
esac

exec "$ray" start --head --block --disable-usage-stats \
    --node-ip-address "$host" --port "${DIST_DML_RAY_PORT:-6379}" \
    --dashboard-host 127.0.0.1 --dashboard-port "${DIST_DML_RAY_DASHBOARD_PORT:-8265}" \
    "$@"
