"""Caption many files: find them, write what people's tools read, survive interruption."""
