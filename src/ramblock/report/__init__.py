# SPDX-License-Identifier: Apache-2.0
"""Pictures of an audit: a page for browsers, a trace for the Perfetto UI."""
