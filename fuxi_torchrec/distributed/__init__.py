"""This process among all: the process groups, failures that end all ranks, gathering by parts."""
