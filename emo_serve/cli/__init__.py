"""The command line: emo-serve serve, pools, demo."""
