# Varnish as a peer of `loadtest bench`: the built-in VCL, and pass by path. @NAME@ is replaced when the peer starts.
# Its parameters are command line arguments: see launcher.rs.
vcl 4.1;

backend origin {
    .host = "@HOST@";
    .port = "@PORT@";
}

sub vcl_recv {
    if (req.url ~ "^/pass/") {
        return (pass);
    }
}
