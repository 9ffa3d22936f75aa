# Sourced by demo.sh and test.sh in the root of the checkout: `. .ci/venv.sh FILE` creates .venv, installs the requirements
# in FILE unless they are installed, and sets $python to the interpreter. PYTHON names another Python to create it with.
requirements=$1
python=.venv/bin/python
stamp=.venv/.installed-$requirements
wanted=$(cat requirements*.txt | cksum)

if ! "$python" -m pip --version >/dev/null 2>&1; then
  base=${PYTHON:-python3}
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $base is not Python 3.10 or newer ($("$base" --version 2>&1)). Name one: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
  fi
  if ! "$base" -m venv --clear .venv; then
    rm -rf .venv
    echo "error: $base can't make virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2
    exit 2
  fi
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing $requirements into .venv (once)"
  "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  echo "$wanted" >"$stamp"
  # The developers' requirements include the users'.
  [ "$requirements" = requirements.txt ] || echo "$wanted" >.venv/.installed-requirements.txt
fi
