"""The benchmark behind every claim of speed: advlab beside the paper's way and other libraries."""
