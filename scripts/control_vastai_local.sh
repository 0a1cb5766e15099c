#!/usr/bin/env bash
# Watches a training that scripts/setup_vastai_remote.sh started on a rented machine, and fetches its checkpoints.
# Runs on your own computer: Linux or macOS (bash 3.2 and any rsync will do). See docs/training.md.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: scripts/control_vastai_local.sh COMMAND [USER@]HOST [-p PORT] [-i KEY] [-d DIR]

  monitor            bring TensorBoard to this computer, and again whenever the connection drops; Ctrl-c ends it
  download-best      best_model.pth, the best validation loss so far
  download-latest    latest_checkpoint.pth, from which training continues
  download-weights   best_model_weights_only.pth, all that captioning needs (small)
  download-all       every checkpoint, and the logs

  -p PORT   SSH port   [ssh's own configuration, or 22]
  -i KEY    private key file   [ssh's own configuration]
  -d DIR    where downloads go   [runs/remote]
  -h, --help

A download that was interrupted goes on where it stopped when the same command is given again. A file appears under its
own name only when its SHA-256 equals that of the file on the machine.
Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.
EOF
}

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
misuse() { printf 'error: %s (see --help)\n' "$*" >&2; exit 2; }

command='' host='' port='' key='' directory=runs/remote

parse_arguments() {
    local positional=()
    while (($#)); do
        case $1 in
            -p | -i | -d)
                (($# > 1)) || misuse "$1 needs a value"
                case $1 in
                    -p) port=$2 ;;
                    -i) key=$(expand_tilde "$2") ;;
                    -d) directory=$(expand_tilde "$2") ;;
                esac
                shift
                ;;
            -h | --help) usage && exit 0 ;;
            -*) misuse "unknown option: $1" ;;
            *) positional+=("$1") ;;
        esac
        shift
    done
    ((${#positional[@]} == 2)) || misuse "give a command and [USER@]HOST"
    command=${positional[0]} host=${positional[1]}
    case $command in
        monitor | download-best | download-latest | download-weights | download-all) ;;
        *) misuse "unknown command: $command" ;;
    esac
    if [[ -n $port && (! $port =~ ^[1-9][0-9]{0,4}$ || $port -gt 65535) ]]; then misuse "no port number: $port"; fi
    if [[ -n $key && ! -r $key ]]; then misuse "no key file at $key"; fi
}

# The shell expands a tilde only where it stands unquoted at the start of a word.
expand_tilde() {
    # shellcheck disable=SC2088  # the tilde is meant literally
    case $1 in
        '~/'*) printf '%s\n' "$HOME/${1:2}" ;;
        *) printf '%s\n' "$1" ;;
    esac
}

# Quotes a word for whatever shell the other side has.
quote() { printf '%s\n' "$1" | sed "s/'/'\\\\''/g; s/^/'/; s/\$/'/"; }

prepare_ssh() {
    # In /tmp, so that its name has no spaces: rsync splits the command that it is given at them.
    scratch=$(mktemp -d /tmp/vlm-bridge.XXXXXX)
    tunnel=''
    trap 'rm -rf "$scratch"; [[ -z $tunnel ]] || kill "$tunnel" 2>/dev/null || true' EXIT
    trap 'say "interrupted" >&2; exit 130' INT
    trap 'exit 143' TERM HUP
    # BatchMode: no question may hang a loop that nobody watches. LogLevel: the machine's banner is no error.
    ssh_command=(
        ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR
        -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=3
    )
    [[ -z $port ]] || ssh_command+=(-p "$port")
    [[ -z $key ]] || ssh_command+=(-i "$key" -o IdentitiesOnly=yes)
    {
        printf 'exec'
        printf ' %q' "${ssh_command[@]}"
        printf ' "$@"\n'
    } >"$scratch/ssh"
}

# One line for what ssh and rsync said in many.
explain() {
    local said keys=${key:+the key $key}
    said=$(tr -d '\r' <"$scratch/stderr")
    case $said in
        *'UNPROTECTED PRIVATE KEY'*) say "ssh takes no key that others may read: chmod 600 '$key'" ;;
        *': Permission denied ('[a-z]*) # of ssh; rsync puts a number there
            say "$host refuses ${keys:-your keys}: add the public key to the machine, and the private" \
                "one to ssh-agent if it has a passphrase"
            ;;
        *'HOST IDENTIFICATION HAS CHANGED'* | *'Host key verification failed'*)
            say "another machine answers at $host than before; if it was rented anew, forget the old one:" \
                "ssh-keygen -R '${port:+[}${host##*@}${port:+]:$port}'"
            ;;
        *'Connection refused'*) say "nothing answers SSH on port ${port:-22} of $host: check the address and -p PORT" ;;
        *'timed out'* | *'No route to host'*) say "$host does not answer: check the address, and that the machine runs" ;;
        *'Could not resolve hostname'*) say "there is no host named ${host##*@}" ;;
        *rsync*'not found'*) say "rsync is missing on $host: apt-get install rsync" ;;
        *'No space left on device'*) say "the disk is full: $directory" ;;
        *[![:space:]]*) grep -m 1 '[^[:space:]]' <<<"$said" ;;
        *) say "the connection broke" ;;
    esac
}

# Runs a line of shell on the machine. Its own failure is the caller's to judge; that of the connection ends us.
on_machine() {
    local status=0
    "${ssh_command[@]}" "$host" "$1" </dev/null 2>"$scratch/stderr" || status=$?
    if ((status == 255)); then fail "$(explain)"; fi
    return "$status"
}

read_record() {
    local record
    record=$(on_machine 'cat .vlm-bridge-remote 2>/dev/null || true')
    checkpoint_dir=$(sed -n 's/^checkpoint_dir=//p' <<<"$record")
    log_dir=$(sed -n 's/^log_dir=//p' <<<"$record")
    tensorboard_port=$(sed -n 's/^tensorboard_port=//p' <<<"$record")
    [[ -n $checkpoint_dir && -n $log_dir && -n $tensorboard_port ]] ||
        fail "no training is set up on $host: run scripts/setup_vastai_remote.sh there first"
}

is_listening() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

pause() {
    sleep "$1" &
    wait "$!" # unlike sleep itself, a wait lets signals through
}

monitor() {
    local local_port=6006 delay=1 started reason
    while is_listening "$local_port"; do local_port=$((local_port + 1)); done
    while :; do
        started=$SECONDS
        # A connection of its own: one shared by ControlMaster would end, or not, with somebody else's.
        "${ssh_command[@]}" -N -o ExitOnForwardFailure=yes -o ControlMaster=no -o ControlPath=none \
            -o PermitLocalCommand=yes -o LocalCommand="echo 'TensorBoard: http://127.0.0.1:$local_port (Ctrl-c ends)'" \
            -L "127.0.0.1:$local_port:127.0.0.1:$tensorboard_port" "$host" </dev/null 2>"$scratch/stderr" &
        tunnel=$!
        wait "$tunnel" 2>/dev/null || true # bash has a remark to make on killed children
        tunnel=''
        reason=$(explain)
        case $reason in *'refuses'* | 'another machine'*) fail "$reason" ;; esac
        if ((SECONDS - started > 60)); then delay=1; fi
        say "tunnel closed: $reason; opening it again in $delay s" >&2
        pause "$delay"
        delay=$((delay * 2 < 30 ? delay * 2 : 30))
    done
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -c -64
}

# Empty where there is no such file.
sha256_on_machine() {
    on_machine "cd $(quote "$checkpoint_dir") && sha256sum <$(quote "$1") || true" |
        sed -n 's/^\([0-9a-f]\{64\}\) .*/\1/p'
}

# The folder is entered by the remote command: rsyncs differ in how they quote remote paths, not in this.
copy() {
    local folder=$1
    shift
    local options=(--timeout=60 -e "bash $scratch/ssh" --rsync-path="cd $(quote "$folder") && rsync")
    if [[ -t 1 ]]; then options+=(--progress); fi
    rsync "${options[@]}" "$@" 2>"$scratch/stderr"
}

fetch() {
    local name=$1 target=$directory/$1 part=$directory/.$1.part wanted problem=''
    wanted=$(sha256_on_machine "$name")
    [[ -n $wanted ]] ||
        fail "there is no $name in $checkpoint_dir on $host yet; it is written when an epoch ends"
    if [[ -f $target && $(sha256 "$target") == "$wanted" ]]; then
        say "$target: up to date"
        return
    fi
    for _ in 1 2 3; do
        # --inplace leaves what arrived even when everything is killed; rsync then sends what is missing. Times
        # mean nothing for such a file, hence --ignore-times.
        if copy "$checkpoint_dir" --inplace --ignore-times "$host:./$name" "$part"; then
            wanted=$(sha256_on_machine "$name")
            if [[ $(sha256 "$part") == "$wanted" ]]; then
                mv -f "$part" "$target"
                say "$target: $(wc -c <"$target" | tr -d ' ') bytes, sha256 $wanted"
                return
            fi
            problem="its checksum differs, so it changed on the machine while it was copied"
        else
            problem=$(explain)
        fi
        say "$name: $problem; trying again" >&2
    done
    fail "$name was not copied: $problem; the same command goes on from what has arrived"
}

fetch_all() {
    local names name
    names=$(on_machine "cd $(quote "$checkpoint_dir") && ls -1 | grep '[.]pth\$' || true")
    [[ -n $names ]] ||
        fail "there are no checkpoints in $checkpoint_dir on $host yet; they are written when an epoch ends"
    while IFS= read -r name; do fetch "$name"; done <<<"$names"
    # Logs grow while they are copied, so there is no checksum to compare but rsync's own.
    copy "$log_dir" -rt --exclude='.*' "$host:./" "$directory/logs/" || fail "the logs were not copied: $(explain)"
    say "$directory/logs: copied"
}

parse_arguments "$@"
prepare_ssh
read_record
if [[ $command == monitor ]]; then monitor; fi
mkdir -p "$directory" 2>/dev/null || fail "cannot make the folder $directory"
# Absolute, because rsync takes a relative name with a colon for one on another host.
directory=$(cd "$directory" && pwd)
case $command in
    download-best) fetch best_model.pth ;;
    download-latest) fetch latest_checkpoint.pth ;;
    download-weights) fetch best_model_weights_only.pth ;;
    download-all) fetch_all ;;
esac
