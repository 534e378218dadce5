#!/usr/bin/env bash
# Usage: tools/check_dist.sh FOLDER [FLAG...]
# Installs the wheel in FOLDER (made by `make dist`) into a clean environment outside the checkout, trains the demo there
# from the installed package alone, shortened, and reads its loss back; then the sdist in its place, which must answer too.
# FLAGs go to `muse fit`; PYTHON and TORCH_INDEX as in the Makefile.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(cd "${1:?usage: tools/check_dist.sh FOLDER [FLAG...]}" && pwd)"
shift
wheels=("${folder}"/*.whl)
sdists=("${folder}"/*.tar.gz)
if [[ ${#wheels[@]} != 1 || ${#sdists[@]} != 1 || ! -f "${wheels[0]}" || ! -f "${sdists[0]}" ]]; then
    echo "tools/check_dist.sh: ${folder} must hold one wheel and one sdist; make dist makes them" >&2
    exit 2
fi

scratch="$(mktemp -d)"
trap 'rm -rf "${scratch}"' EXIT
cd "${scratch}"
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
"${PYTHON:-python3}" -m venv venv
pip=(venv/bin/python -m pip install --quiet --constraint "${root}/constraints.txt")
"${pip[@]}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
"${pip[@]}" "${wheels[0]}"
# The same line as in the README: beside a torch of another build it breaks `import lightning`.
venv/bin/python -m pip uninstall --quiet --yes torchvision

installed="$(venv/bin/python -c 'import muse_lightning; print(muse_lightning.__path__[0])')"
case "${installed}" in
    "${scratch}"/venv/*) ;;
    *) echo "tools/check_dist.sh: muse_lightning is imported from ${installed}" >&2; exit 1 ;;
esac
venv/bin/muse fit --config recipe:demo --config "${root}/tools/short_demo.yaml" "$@"
venv/bin/python "${root}/tools/check_loss.py" runs

"${pip[@]}" --no-deps --force-reinstall "${sdists[0]}"
venv/bin/muse --version
venv/bin/muse fit --config recipe:demo --print_config > /dev/null
echo "tools/check_dist.sh: both install, and the demo trains from the wheel"
