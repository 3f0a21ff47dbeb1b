"""What evaluates tile functions: values of the DAG on pieces of vectors, heads of an attention, the step of a user's fold."""
