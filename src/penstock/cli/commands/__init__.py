"""What can be typed: a file for each command, which is its options and help. Its work is imported when it runs."""
