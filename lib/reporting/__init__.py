"""Reports, comparisons, queries and exports."""
