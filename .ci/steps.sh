# Read by the scripts of this folder: `step` begins a step and ends the one before. When the script that read this first
# exits, it prints what each step took, also those of the scripts that it called.

# Seconds of processor time that ended children took, in REPLY.
processor_seconds() {
    times > "$step_scratch"
    REPLY=$(awk 'NR == 2 { gsub(/[ms]/, " "); print int($1 * 60 + $2 + $3 * 60 + $4) }' "$step_scratch")
}

end_step() {
    [ -n "$step_name" ] || return 0
    processor_seconds
    printf '%s\t%d\t%d\n' "$step_name" $((SECONDS - step_began)) $((REPLY - step_before)) >> "$STEPS"
    step_name=
}

step() {
    end_step
    processor_seconds
    step_name=$1 step_began=$SECONDS step_before=$REPLY
    printf '\n== %s\n' "$1"
}

end_script() {
    local code=${1:-$?}
    [ "$code" = 0 ] || step_name=${step_name:+$step_name: failed}
    end_step
    if [ "$step_first" = yes ]; then
        printf '\n== seconds, and of them on processors\n'
        awk -F '\t' '{ printf "%6d %6d  %s\n", $2, $3, $1; all += $2; work += $3 } END { printf "%6d %6d  all\n", all, work }' "$STEPS"
        rm -f "$STEPS"
    fi
    rm -f "$step_scratch"
}

export CARGO_INCREMENTAL=0
# Documentation comes with the doc tests (.ci/rustdoc), lints with every build.
CLIPPY_DRIVER=$(rustc --print sysroot)/bin/clippy-driver
RUSTC_WORKSPACE_WRAPPER=$PWD/.ci/rustc
RUSTDOC=$PWD/.ci/rustdoc
export CLIPPY_DRIVER RUSTC_WORKSPACE_WRAPPER RUSTDOC CLIPPY_ARGS="-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__"
step_name= step_scratch=$(mktemp) step_first=no
if [ -z "${STEPS:-}" ]; then
    step_first=yes
    STEPS=$(mktemp)
    export STEPS
fi
trap end_script EXIT
