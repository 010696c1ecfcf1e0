"""KV of passages ("chunks") that recur in prompts, computed once and used wherever they stand."""
