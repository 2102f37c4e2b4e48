"""The layers around vLLM's app: keys, admission, coverage in answers, errors."""
