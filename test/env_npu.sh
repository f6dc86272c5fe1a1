# shellcheck shell=bash
# Sets the environment of an Ascend NPU. Sourced by the launchers. Does nothing if CANN is not installed.
#
#   npu_environment [process-group timeout, seconds]
#
# It sets only unset variables, so a cluster's own settings take precedence. A scheduler that has already prepared the
# environment sets etp_running_flag=true.

find_cann() { # prints the set_env.sh of the CANN to use; a user's own installation comes first
  local base script
  for base in "${HOME:-/nonexistent}/Ascend" /usr/local/Ascend; do
    # The names without a version are links to the version in use. Without a link, take the newest version.
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
    set +eu # CANN's script reads unset variables and ends with failing tests
    # shellcheck disable=SC1090
    source "$script"
    set -eu
  fi
  # 2 launches kernels from a second thread: faster, but needs some more memory (torch_npu's manual).
  export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
  export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
  export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
  export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}
  export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
  # HCCL_IF_IP overrides HCCL_SOCKET_IFNAME, so it must not be set if the user chose an interface.
  if [[ -z ${HCCL_IF_IP:-}${HCCL_SOCKET_IFNAME:-} ]] && read -r HCCL_IF_IP _ < <(hostname -I 2>/dev/null); then
    export HCCL_IF_IP
  fi
  # Shorter than the process group's timeout, because HCCL's message names the missing rank and torch's does not.
  connect_timeout=$((group_timeout * 2 / 3))
  export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-$((connect_timeout < 1200 ? connect_timeout : 1200))}
  if ((HCCL_CONNECT_TIMEOUT >= group_timeout)); then
    echo "note: HCCL_CONNECT_TIMEOUT=$HCCL_CONNECT_TIMEOUT should be less than --ddp_timeout $group_timeout" >&2
  fi
}
