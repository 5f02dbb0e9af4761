"""The surfaces of raw upstream models alone: completions, embeddings, audio, images, moderations, files, batches."""
