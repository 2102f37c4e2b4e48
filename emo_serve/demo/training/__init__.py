"""How the shipped models were made: corpus, tokenizer, training, release."""
