"""Request::lookup: check.cpp drives the engine with it."""
from checking import *

run_check("6-prompt-lookup")
