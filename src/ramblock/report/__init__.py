# SPDX-License-Identifier: Apache-2.0
"""Pictures of what an audit saw: a page for browsers, a trace for the Perfetto UI."""
