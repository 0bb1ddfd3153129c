"""Moving the accepted rows' keys and values behind the root."""
