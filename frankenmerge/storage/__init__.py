"""Bytes on disk and on the hub: atomic writing, safetensors headers, downloads."""
