"""What the files of a checkpoint directory hold, whatever the model's family."""
