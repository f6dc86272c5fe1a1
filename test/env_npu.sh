# shellcheck shell=bash
# Environment of an Ascend NPU; sourced by the launchers. Without a CANN it does nothing, silently.
#
#   npu_environment [process-group timeout, seconds]
#
# Only what is unset is set, so that a cluster's own settings win. A scheduler that has prepared the
# environment already says so with etp_running_flag=true.

find_cann() { # prints the set_env.sh of the CANN to use; a user's own installation goes first
  local base script
  for base in "${HOME:-/nonexistent}/Ascend" /usr/local/Ascend; do
    # The names without a version are links to the one in use; where there is none, the newest version.
    for script in "$base"/{cann,ascend-toolkit,nnae}{,/latest}/set_env.sh \
      "$(printf '%s\n' "$base"/cann-*/set_env.sh | sort -V | tail -n 1)"; do
      if [[ -r $script ]]; then
        printf '%s\n' "$script"
        return
      fi
    done
  done
  return 1
}

npu_environment() {
  local group_timeout=${1:-1800} script connect_timeout
  [[ ${etp_running_flag:-} == true ]] && return
  if [[ -z ${ASCEND_HOME_PATH:-}${ASCEND_TOOLKIT_HOME:-} ]]; then
    script=$(find_cann) || return 0
    set +eu # CANN's script reads unset variables and ends with tests that fail
    # shellcheck disable=SC1090
    source "$script"
    set -eu
  fi
  # 2 hands kernels to the device from a second thread: faster, some more memory (torch_npu's manual).
  export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
  export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
  export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
  export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}
  export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
  # HCCL_IF_IP beats HCCL_SOCKET_IFNAME, so it must not be set for those who chose an interface.
  if [[ -z ${HCCL_IF_IP:-}${HCCL_SOCKET_IFNAME:-} ]] && read -r HCCL_IF_IP _ < <(hostname -I 2>/dev/null); then
    export HCCL_IF_IP
  fi
  # Below the process group's own timeout: HCCL's message names the rank that is missing, torch's does not.
  connect_timeout=$((group_timeout * 2 / 3))
  export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-$((connect_timeout < 1200 ? connect_timeout : 1200))}
  if ((HCCL_CONNECT_TIMEOUT >= group_timeout)); then
    echo "note: HCCL_CONNECT_TIMEOUT=$HCCL_CONNECT_TIMEOUT should be below --ddp_timeout $group_timeout" >&2
  fi
}
