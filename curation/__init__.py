"""Scores a corpus and marks the documents to keep: on one host, on several, or on Apache Beam."""
