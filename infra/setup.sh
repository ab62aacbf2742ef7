#!/usr/bin/env bash
# Creates or updates the environment in .venv: uv, torch, the packages of requirements.lock, and the project itself.
#
# PYTHON selects the interpreter (3.11 or newer). If pip is configured with a mirror, a certificate or a folder of
# wheels (PIP_INDEX_URL, PIP_CERT, PIP_FIND_LINKS or pip's own configuration file), uv gets the same settings; UV_*
# variables that are already set take precedence; UV_TORCH_BACKEND=cpu (cu130, ...) selects a build of torch instead of
# the one that fits this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv_version=0.13.8
python=${PYTHON:-python3}

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

make_venv() {
  if .venv/bin/python -c '' 2>/dev/null; then return; fi
  command -v "$python" >/dev/null || fail "no $python; install Python 3.11 or newer, or name one: make PYTHON=..."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" -V) is too old; install Python 3.11 or newer, or name one: make PYTHON=..."
  say "environment in .venv, $("$python" -V)"
  "$python" -m venv --clear .venv || fail "cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv"
}

pip_setting() { # pip_setting NAME: from the environment, else from pip's configuration files
  local variable="PIP_${1^^}"
  variable=${variable//-/_}
  if [ -n "${!variable:-}" ]; then
    printf '%s' "${!variable}"
  else
    .venv/bin/pip config get "global.$1" 2>/dev/null || true
  fi
}

hand_pip_settings_to_uv() {
  local index links cert
  index=$(pip_setting index-url)
  links=$(pip_setting find-links | tr -s ' \n' ',')
  cert=$(pip_setting cert)
  if [ -n "$index" ]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
  if [ -n "$links" ]; then export UV_FIND_LINKS=${UV_FIND_LINKS:-${links%,}}; fi
  if [ -n "$cert" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$cert}; fi
  export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
}

install_uv() {
  if .venv/bin/uv --version 2>/dev/null | grep -qF " $uv_version "; then return; fi
  say "uv $uv_version"
  .venv/bin/pip install --quiet --disable-pip-version-check "uv==$uv_version"
}

uv_install() { VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install "$@"; }

pinned() { # pinned NAME: the requirement NAME==... of pyproject.toml
  sed -nE "s/^ *\"($1==[^\"]+)\".*/\1/p" pyproject.toml
}

has_local_wheel() { # has_local_wheel torch==2.13.0: in a folder of UV_FIND_LINKS, for this Python
  local tag folder
  tag=$(.venv/bin/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  for folder in ${UV_FIND_LINKS//,/ }; do
    folder=${folder#file://}
    if compgen -G "$folder/${1/==/-}[+-]*$tag-*.whl" >/dev/null; then return 0; fi
  done
  return 1
}

install_torch() { # a local wheel, else the build for this machine's driver (without one: CPU), else the index's own
  local torch torchvision
  torch=$(pinned torch)
  torchvision=$(pinned torchvision)
  say "$torch, $torchvision"
  if has_local_wheel "$torch"; then
    uv_install --no-deps "$torch" "$torchvision"
  elif ! uv_install --torch-backend="${UV_TORCH_BACKEND:-auto}" "$torch" "$torchvision"; then
    say "PyTorch's own index cannot be reached; taking the CUDA build of the package index (several GB)"
    uv_install "$torch" "$torchvision"
  fi
}

lock() { # without torch and torchvision, whose build depends on the machine
  local backend=(--torch-backend=cpu)
  if has_local_wheel "$(pinned torch)"; then backend=(); fi
  .venv/bin/uv pip compile pyproject.toml --extra dev --python-version 3.11 --no-header "${backend[@]}" \
    --no-emit-package torch --no-emit-package torchvision --no-emit-index-url --no-emit-find-links \
    "$@" -o requirements.lock
}

main() {
  make_venv
  hand_pip_settings_to_uv
  install_uv
  if [ "${1:-}" = lock ]; then
    shift
    lock "$@"
    return
  fi
  install_torch
  say "requirements.lock"
  # The lock file is complete, so nothing is resolved again; torch is not changed.
  uv_install --no-deps -r requirements.lock
  uv_install --no-deps --no-build-isolation --editable .
  say "torch, torchvision and transformers together"
  .venv/bin/python -I infra/torchvision_ops.py
}

main "$@"
