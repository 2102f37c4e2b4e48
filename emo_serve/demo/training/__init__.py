"""How the models that ship were made: corpus, tokenizer, training, release."""
