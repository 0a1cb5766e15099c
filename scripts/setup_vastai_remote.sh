#!/usr/bin/env bash
# Trains on a rented GPU machine (vast.ai, or any Linux with an NVIDIA driver). Run it there, as often as needed:
# what is done is not done again, a training that runs is left alone, and one that stopped is continued. It may be piped
# into bash: then it clones the repository and goes on with the script in there.
# docs/training.md goes through it step by step.
set -euo pipefail

# Out of the environment at once: nothing that is started below carries the token where `ps e` could show it. And
# should somebody trace this script, the trace ends here.
{ set +x; } 2>/dev/null
declare +x token=${HF_TOKEN:-}
unset HF_TOKEN

usage() {
    cat <<'EOF'
Usage: scripts/setup_vastai_remote.sh [OPTION]...                         in a checkout
       curl -LSsf SCRIPT_URL | bash -s -- REPOSITORY [OPTION]...          anywhere; REPOSITORY is a URL or a path

Outside a checkout, clones REPOSITORY into ./vlm-bridge, or goes on with what is there. Then it checks the GPU,
installs vlm-bridge into .venv, stores the Hugging Face token, starts TensorBoard on 127.0.0.1, prepares
GroundCap and trains inside tmux, where a dropped SSH connection stops nothing.

  --config FILE    recipe, as seen from the checkout   [config/training-default.yaml]
  --data-dir DIR   caption folder; GroundCap is prepared into it unless it is finished   [data/groundcap]
  --allow-cpu      go on without a GPU (a trial: training would take weeks)
  --install-only   stop after the installation
  --watch SECONDS  how long to wait for early trouble before leaving training alone in tmux   [10]
  --foreground     train in this terminal instead of tmux (for SkyPilot and other schedulers)
  -h, --help       show this

Environment: HF_TOKEN (otherwise asked for, without echo, where there is a terminal), PYTHON (3.11 or newer), and
whatever pip and huggingface_hub read, such as PIP_EXTRA_INDEX_URL and HF_HOME.
Exit codes: 0 done or training runs, 1 failed, 2 bad usage.
EOF
}

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
misuse() { printf 'error: %s (see --help)\n' "$*" >&2; exit 2; }

readonly source=${BASH_SOURCE[0]:-} # empty where the script is piped in
root=$(cd "$(dirname "$source")/.." && pwd -P)
readonly root
readonly name=setup_vastai_remote.sh
readonly session=vlm-bridge
readonly script=$root/scripts/$name
readonly venv=$root/.venv
readonly checkpoint_dir=$root/checkpoints
readonly log_dir=$root/logs
readonly log=$log_dir/training.log
# What scripts/control_vastai_local.sh reads to find the run, whatever the checkout is called.
readonly record=$HOME/.vlm-bridge-remote

config=config/training-default.yaml
data_dir=data/groundcap
watch=10
allow_cpu=no
mode=tmux

is_checkout() { [[ -f $1/pyproject.toml && -f $1/scripts/$name ]]; }

# Piped in or fetched alone: goes on with the script of the checkout around or below this folder, which it clones
# where there is none.
continue_in_checkout() {
    local repository='' folder=$PWD message input=/dev/null
    case ${1:-} in
        -h | --help) usage && exit 0 ;;
        '' | -*) ;;
        *) repository=$1 && shift ;;
    esac
    until is_checkout "$folder" || [[ $folder == / ]]; do folder=$(dirname "$folder"); done
    if [[ $folder == / ]]; then folder=${PWD%/}/vlm-bridge; fi
    if ! is_checkout "$folder"; then
        [[ -n $repository ]] ||
            misuse "no checkout of vlm-bridge here: say which repository to clone: ... | bash -s -- URL_OR_PATH"
        [[ ! -e $folder ]] || fail "$folder is in the way: it is no checkout of vlm-bridge; move it or go elsewhere"
        require_tool git git
        say "cloning into $folder"
        rm -rf "$folder.unfinished"
        message=$(git clone --quiet -- "$repository" "$folder.unfinished" 2>&1) ||
            fail "cannot clone: ${message%%$'\n'*}; check the URL or path of the repository"
        is_checkout "$folder.unfinished" || fail "the repository is not vlm-bridge: it has no scripts/$name"
        mv "$folder.unfinished" "$folder"
    fi
    # The script came by standard input; the token is asked for on the terminal, where there is one.
    if (: </dev/tty) 2>/dev/null; then input=/dev/tty; fi
    HF_TOKEN=$token exec bash "$folder/scripts/$name" "$@" <"$input"
}

parse_arguments() {
    while (($#)); do
        case $1 in
            --config | --data-dir | --watch) (($# > 1)) || misuse "$1 needs a value" ;;&
            --config) config=$2 && shift ;;
            --data-dir) data_dir=$2 && shift ;;
            --watch) watch=$2 && shift ;;
            --allow-cpu) allow_cpu=yes ;;
            --install-only) mode=install ;;
            --foreground) mode=foreground ;;
            -h | --help) usage && exit 0 ;;
            *) misuse "unknown argument: $1" ;;
        esac
        shift
    done
    [[ $watch =~ ^[0-9]+$ ]] || misuse "--watch takes whole seconds, not $watch"
    [[ -f $config ]] || misuse "no recipe at $root/$config; recipes that ship are in config/"
}

check_gpu() {
    local gpus
    if gpus=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null) &&
        [[ -n $gpus ]]; then
        while IFS= read -r gpu; do say "GPU: $gpu (name, memory, driver)"; done <<<"$gpus"
    elif [[ $allow_cpu == yes ]]; then
        say "GPU: none; going on without, as --allow-cpu says"
    else
        fail "no NVIDIA GPU: nvidia-smi finds none; rent a machine that has one, or try things out with --allow-cpu"
    fi
}

# Images for rented machines lack one or the other of these; most of them are Debian's children and run as root.
require_tool() {
    local tool=$1 package=$2 sudo=
    command -v "$tool" >/dev/null && return
    ((EUID == 0)) || sudo=sudo
    if command -v apt-get >/dev/null; then
        say "installing $package"
        # shellcheck disable=SC2086  # empty for root
        { $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } \
            >/dev/null || true
    fi
    command -v "$tool" >/dev/null || fail "$tool is missing and cannot be installed; install the package $package"
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            say "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with its venv module; install one and name it: PYTHON=python3.12 $script"
}

install_package() {
    local stamp=$venv/.installed-gpu python cuda
    [[ $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]] && return
    if [[ ! -x $venv/bin/python ]]; then
        python=$(find_python)
        "$python" -m venv "$venv"
    fi
    say "installing vlm-bridge into $venv (torch with CUDA is a download of some gigabytes)"
    # The tested versions, but for torch and what it brings: a GPU wants the build for its driver.
    mkdir -p build
    grep -vE '^(torch|triton)==|^(nvidia|cuda)-' constraints.txt >build/constraints-gpu.txt
    "$venv/bin/python" -m pip install --quiet --constraint build/constraints-gpu.txt --editable '.[gpu]'
    if [[ $allow_cpu == no ]]; then
        cuda=$("$venv/bin/python" -c \
            'import sys, torch; print(torch.version.cuda); sys.exit(not torch.cuda.is_available())' 2>/dev/null) ||
            fail "torch (CUDA ${cuda:-none}) cannot use this GPU: most likely the driver is older than that CUDA; rent a" \
                "machine with a newer driver, or delete $venv and run this again with PIP_EXTRA_INDEX_URL set to" \
                "PyTorch's index for an older CUDA (pytorch.org/get-started names them)"
    fi
    touch "$stamp"
}

# Into huggingface_hub's own file, for its owner alone. printf is a builtin, so no process list shows its arguments.
store_token() {
    local file=${HF_TOKEN_PATH:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/token}
    if [[ -z $token && ! -s $file && -t 0 ]]; then
        read -rsp 'HF_TOKEN (not shown; a read token from huggingface.co/settings/tokens; Enter for none): ' token
        say ''
    fi
    if [[ -n $token ]]; then
        (
            umask 077
            mkdir -p "$(dirname "$file")"
            printf '%s' "${token//[[:space:]]/}" >"$file.new"
            mv -f "$file.new" "$file"
        )
        say "Hugging Face token: stored in $file"
    elif [[ -s $file ]]; then
        say "Hugging Face token: found in $file"
    else
        say "Hugging Face token: none; models behind terms of use (Gemma) will be refused"
    fi
}

is_listening() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Whoever holds a lock file's descriptor is alive: TensorBoard and the training inherit theirs, so a lock ends with
# its process however that ends, and there are no process ids to go stale.
start_tensorboard() {
    local port
    exec 7>>"$log_dir/.tensorboard.lock"
    if ! flock --nonblock 7; then
        exec 7>&-
        say "TensorBoard: runs already"
        return
    fi
    # Some images come with a TensorBoard of their own on 6006.
    for ((port = 6006; port < 6106; port++)); do is_listening "$port" || break; done
    setsid nohup "$venv/bin/tensorboard" --logdir "$log_dir" --host 127.0.0.1 --port "$port" \
        </dev/null >>"$log_dir/tensorboard.log" 2>&1 &
    exec 7>&-
    printf '%s=%s\n' checkpoint_dir "$checkpoint_dir" log_dir "$log_dir" tensorboard_port "$port" >"$record.new"
    mv -f "$record.new" "$record"
    say "TensorBoard: http://127.0.0.1:$port on this machine; scripts/control_vastai_local.sh monitor brings it to yours"
}

train_here() {
    local arguments=(--config "$config" --resume auto)
    exec 9>>"$log_dir/.training.lock"
    flock --nonblock 9 || fail "a training runs already in $root; watch it with: tail -f '$log'"
    # The manifest is written last; without it, the same command goes on where an earlier one stopped. The original
    # project writes none: its folder is used as it is.
    if [[ ! -f $data_dir/manifest.json && (-d $data_dir/.unfinished || ! -f $data_dir/train/captions.jsonl) ]]; then
        "$venv/bin/vlm-data" transform --source groundcap --output-dir "$data_dir"
    fi
    arguments+=("data_dir=$data_dir" "checkpoint_dir=$checkpoint_dir" "log_dir=$log_dir")
    # In this process's place, so that signals reach what has a state to save.
    exec "$venv/bin/vlm-training" "${arguments[@]}"
}

# A tmux server of our own (-L): it has this environment, and nobody's configuration.
in_tmux() { tmux -f /dev/null -L "$session" "$@"; }
tmux_runs() { in_tmux has-session -t "=$session" 2>/dev/null; }

show_how_to_follow() {
    say "  watch:  tail -f '$log'"
    say "  attach: tmux -L $session attach    (leave with Ctrl-b d; Ctrl-c saves a checkpoint and stops)"
}

train_in_tmux() {
    local again=(--foreground --config "$config" --data-dir "$data_dir") last waited
    [[ $allow_cpu == yes ]] && again+=(--allow-cpu)
    # No input, or the token would be asked for where nobody looks. tee outlives Ctrl-c: saving may still have
    # something to say.
    # shellcheck disable=SC2016  # for the inner shell
    local job='{ bash "$@" </dev/null; echo "ended with exit code $?"; } 2>&1 | tee --append --ignore-interrupts "$0"'
    if tmux_runs; then
        say "training: runs already"
        show_how_to_follow
        return
    fi
    in_tmux new-session -d -s "$session" bash -c "$job" "$log" "$script" "${again[@]}"
    # What fails at once (a lock held by a training outside tmux, a wrong recipe) is told here and now.
    for ((waited = 0; waited < watch; waited++)); do
        tmux_runs || break
        sleep 1
    done
    if tmux_runs; then
        say "training: started in tmux; this connection may close"
        show_how_to_follow
        return
    fi
    last=$(tail -n 2 "$log")
    [[ $last == *'exit code 0' ]] || fail "training ${last##*$'\n'}: ${last%%$'\n'*} (all of it: $log)"
    say "training: finished; checkpoints are in $checkpoint_dir"
}

main() {
    if [[ -z $source ]] || ! is_checkout "$root"; then continue_in_checkout "$@"; fi
    cd "$root"
    parse_arguments "$@"
    check_gpu
    require_tool flock util-linux
    require_tool rsync rsync # control_vastai_local.sh talks to it
    if [[ $mode == tmux ]]; then require_tool tmux tmux; fi
    install_package
    if [[ $mode == install ]]; then exit; fi
    store_token
    mkdir -p "$log_dir" "$checkpoint_dir"
    start_tensorboard
    if [[ $mode == foreground ]]; then train_here; fi
    train_in_tmux
}

# The last line: of a download that broke off, nothing is run.
main "$@"
