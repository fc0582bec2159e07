"""Tools of the MCP servers that the operator has named: listing and calling them. Knows nothing of chat or HTTP."""
