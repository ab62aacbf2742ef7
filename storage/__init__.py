"""The content-addressed artifact store, and readers and writers of the tables in artifacts. Imports no torch or Ray."""
