"""OpenAI batch files: requests as JSON lines in, responses as JSON lines out."""
