#!/usr/bin/env bash
# A real Slurm 24.11 of two nodes on one machine: slurmctld, two slurmd, slurmdbd with MariaDB, munge, eight fake GPUs a node.
#
#   slurm_cluster.sh install SOFTWARE     fetch Debian 13's packages with apt and unpack them into SOFTWARE (0.2 GB)
#   slurm_cluster.sh up SOFTWARE STATE    start it; then: export SLURM_CONF=STATE/slurm.conf PATH=SOFTWARE/bin:$PATH
#   slurm_cluster.sh down STATE           cancel its jobs and stop it
#
# Needs root (both nodes' names go into /etc/hosts) and, to install, apt of Debian with its archive keyring. Nothing is
# installed into the system: programs are unpacked and told to use the libraries beside them, so that Debian 12 and others
# run them, and jobs run in the machine's own environment. Loopback only. Exit code 3: cannot work on this machine.
set -euo pipefail

RELEASE=trixie
PACKAGES=(slurmctld slurmd slurmdbd slurm-client slurm-wlm-basic-plugins slurm-wlm-mysql-plugin munge
    mariadb-server-core mariadb-client-core patchelf)
PROGRAMS=(munged mariadbd slurmdbd slurmctld slurmd slurmstepd mariadb
    sbatch srun squeue scancel scontrol sinfo sacct sacctmgr)
NODES="127.0.0.1 n1 n2 # two-node test Slurm of" # a line for each, so that none takes another's away

cannot() {
    echo "$*" >&2
    exit 3
}

install() {
    local software=$1 mirror library program file
    [ -e "$software/complete" ] && return
    [ "$(uname -m)" = x86_64 ] || cannot "the packages are for x86-64, this is $(uname -m)"
    command -v apt-get >/dev/null || cannot "no apt-get here to fetch Slurm's packages with"
    # The mirror that this machine takes Debian from.
    mirror=$(sed -nE 's/^(URIs:|deb( \[.*\])?) +(https?:[^ ]*\/debian)\/?( .*)?$/\3/p' /etc/apt/sources.list \
        /etc/apt/sources.list.d/* 2>/dev/null | head -n 1) || true # one of the files is missing
    [ -n "$mirror" ] || cannot "apt's sources name no Debian mirror"
    rm -rf "$software"
    mkdir -p "$software"/{apt/lists/partial,apt/archives/partial,root,bin}
    software=$(realpath "$software")
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $RELEASE main" >"$software/apt/sources.list"
    : >"$software/apt/status" # as if no package were there: all that they need is fetched
    # Without a network apt would wait for minutes.
    local apt=(timeout 90 apt-get -q -o Acquire::Retries=1 -o Acquire::http::Timeout=20
        -o "Dir::Etc::sourcelist=$software/apt/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$software/apt/lists" -o "Dir::State::status=$software/apt/status"
        -o "Dir::Cache=$software/apt" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root
        -o APT::Install-Recommends=false -o Acquire::Languages=none -o Debug::NoLocking=1)
    "${apt[@]}" update >"$software/apt/log" 2>&1 && "${apt[@]}" install --yes --download-only "${PACKAGES[@]}" \
        >>"$software/apt/log" 2>&1 || cannot "apt cannot fetch Debian $RELEASE's packages: $(tail -n 1 "$software/apt/log")"
    for file in "$software"/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$file" | tar -x -C "$software/root" --keep-directory-symlink
    done
    library=$software/root/usr/lib/x86_64-linux-gnu
    local patchelf=("$library/ld-linux-x86-64.so.2" --library-path "$library" "$software/root/usr/bin/patchelf")
    for program in "${PROGRAMS[@]}"; do
        file=$(find "$software/root/usr/bin" "$software/root/usr/sbin" -name "$program-wlm" -o -name "$program" | sort -r | head -n 1)
        "${patchelf[@]}" --set-interpreter "$library/ld-linux-x86-64.so.2" \
            --force-rpath --set-rpath "$library:$library/slurm-wlm" "$file"
        ln -s "$file" "$software/bin/$program"
    done
    # A library that names its own folder would not look where the programs look.
    for file in "$library"/slurm-wlm/*.so*; do
        [ -L "$file" ] || "${patchelf[@]}" --remove-rpath "$file"
    done
    rm -rf "$software/apt"
    touch "$software/complete"
}

up() {
    local software state host port
    software=$(realpath "$1") state=$(realpath -m "$2") host=$(hostname -s) port=${SLURM_PORT:-16817}
    [ "$(id -u)" = 0 ] || cannot "starting Slurm's daemons needs root"
    [ ! -e "$state/slurm.conf" ] || { echo "$state: a Slurm was here before; name a new folder" >&2 && exit 1; }
    export PATH=$software/bin:$PATH SLURM_CONF=$state/slurm.conf MYSQL_UNIX_PORT=$state/mysql/socket
    mkdir -p "$state"/{run,log,spool/n1,spool/n2,state,mysql}
    chmod 755 "$state" "$state/run"
    echo "$NODES $state" >>/etc/hosts
    (umask 077 && head -c 128 /dev/urandom >"$state/munge.key")
    munged --force --socket="$state/run/munge.socket" --key-file="$state/munge.key" --pid-file="$state/run/munged.pid" \
        --log-file="$state/log/munged.log" --seed-file="$state/run/munged.seed"
    start_database "$software" "$state" &
    write_configuration "$software" "$state" "$host" "$port"
    wait $! || fail "$state" "MariaDB did not start"
    slurmdbd
    until_true 20 timeout 3 sacctmgr --noheader list cluster || fail "$state" "slurmdbd did not start"
    slurmctld -i
    for node in n1 n2; do
        slurmd -N "$node" -d "$software/bin/slurmstepd"
    done
    until_true 30 both_idle || fail "$state" "the nodes did not come up"
}

start_database() {
    local software=$1 state=$2 share=$1/root/usr/share/mariadb
    local options=(--no-defaults --user=root --datadir="$state/mysql" --lc-messages-dir="$share" --socket="$MYSQL_UNIX_PORT"
        --skip-networking --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0)
    { printf 'create database mysql;\nuse mysql;\n' && cat "$share"/mariadb_system_tables{,_data}.sql; } |
        mariadbd "${options[@]}" --bootstrap >"$state/log/bootstrap.log" 2>&1
    setsid mariadbd "${options[@]}" --skip-grant-tables --pid-file="$state/run/mariadbd.pid" \
        >"$state/log/mariadbd.log" 2>&1 </dev/null &
    until_true 20 mariadb --no-defaults -e 'create database if not exists slurm_acct_db'
}

write_configuration() {
    local software=$1 state=$2 host=$3 port=$4 gpu
    cat >"$state/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$state/run/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 2))
SlurmUser=root
PluginDir=$software/root/usr/lib/x86_64-linux-gnu/slurm-wlm
PidFile=$state/run/slurmdbd.pid
LogFile=$state/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageLoc=slurm_acct_db
END
    chmod 600 "$state/slurmdbd.conf"
    for gpu in 0 1 2 3 4 5 6 7; do
        mknod "$state/gpu$gpu" c 1 3 # /dev/null under another name
    done
    echo "NodeName=n[1-2] Name=gpu File=$state/gpu[0-7]" >"$state/gres.conf"
    echo 'CgroupPlugin=disabled' >"$state/cgroup.conf"
    # cred_expire: a requeued job waits until its old credential has expired, two minutes by default.
    cat >"$state/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$port
PluginDir=$software/root/usr/lib/x86_64-linux-gnu/slurm-wlm
AuthType=auth/munge
AuthInfo=socket=$state/run/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
ReturnToService=2
KillWait=30
MinJobAge=${SLURM_MIN_JOB_AGE:-10}
SlurmctldTimeout=60
SlurmdTimeout=20
MessageTimeout=30
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmdPidFile=$state/run/slurmd.%n.pid
SlurmdSpoolDir=$state/spool/%n
StateSaveLocation=$state/state
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd.%n.log
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 2))
AccountingStoragePass=$state/run/munge.socket
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 4))-$((port + 5))] CPUs=16 RealMemory=64000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

both_idle() { [ "$(timeout 5 sinfo --noheader -N -o %T 2>/dev/null | grep -cx idle)" = 2 ]; }

until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

fail() {
    echo "Slurm did not come up: $2" >&2
    tail -n 15 "$1"/log/*.log >&2
    down "$1"
    exit 1
}

down() {
    local state file pid
    state=$(realpath -m "$1")
    [ -e "$state/slurm.conf" ] || return 0
    export SLURM_CONF=$state/slurm.conf
    # Jobs first: their steps would outlive the daemons.
    timeout 5 scancel --signal=KILL --full --user=root >/dev/null 2>&1 || true
    timeout 5 scancel --user=root >/dev/null 2>&1 || true
    until_true 10 no_jobs || true
    for file in "$state"/run/slurmd.n[12].pid "$state"/run/{slurmctld,slurmdbd,munged,mariadbd}.pid; do
        [ -s "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        until_true 10 ended "$pid" || kill -9 "$pid"
    done
    # What waited for an answer of theirs.
    for file in /proc/[0-9]*/environ; do
        if grep -qzx "SLURM_CONF=$SLURM_CONF" "$file" 2>/dev/null && grep -qz '^SLURM_JOB_ID=' "$file" 2>/dev/null; then
            kill -9 "$(basename "$(dirname "$file")")" 2>/dev/null || true
        fi
    done
    grep -vxF "$NODES $state" /etc/hosts >"$state/hosts" || true
    cat "$state/hosts" >/etc/hosts # in place: it may be a mount
}

no_jobs() { [ -z "$(timeout 5 squeue --noheader)" ]; }
# Gone, or a zombie that a slow init has not collected yet.
ended() { ! grep -q '^State:[[:space:]]*[^Z[:space:]]' "/proc/$1/status" 2>/dev/null; }

case "${1:-}:$#" in
install:2) install "$2" ;;
up:3) up "$2" "$3" ;;
down:2) down "$2" ;;
*)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
