"""Request::lookup, and --lookup K: check.cpp drives the engine with it."""
import subprocess
import sys

from checking import *

make("build/exercises/6-prompt-lookup")
sys.exit(subprocess.run(["build/exercises/6-prompt-lookup"]).returncode)
