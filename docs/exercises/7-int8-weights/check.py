"""Model(folder, dummy, int8_head): check.cpp compares logits, perplexity and what is read."""
from checking import *

run_check("7-int8-weights")
