"""Trained models as mixtures of slices, and back: the verbs `convert moefy`, `convert factor`, `convert dense`.

A `Host` is a model whose feed-forward parts can be replaced: ours of texts, ours of speech, Hugging Face's.
"""
