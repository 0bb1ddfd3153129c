"""Where the plugin touches vLLM: supported versions, names, and every patch."""
