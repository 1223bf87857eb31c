"""The scaling-law fit of a sweep's results, and its report."""
