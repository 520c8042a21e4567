//! The application that is called: what each port does is in [`Port`].

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// What the ports above the server's address do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Port {
    /// Sends back what comes.
    Echo,
    /// Reads until the end, then answers with how much it was.
    Sink,
    /// Sends until the caller goes.
    Source,
    /// One byte in, one byte back, closed.
    Once,
}

impl Port {
    pub(crate) const ALL: [Self; 4] = [Self::Echo, Self::Sink, Self::Source, Self::Once];

    /// Its distance from the first.
    pub(crate) fn offset(self) -> u16 {
        match self {
            Self::Echo => 0,
            Self::Sink => 1,
            Self::Source => 2,
            Self::Once => 3,
        }
    }
}

/// Serves until the process is stopped.
pub(crate) fn run(address: SocketAddr) -> anyhow::Result<()> {
    crate::processes::raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for port in Port::ALL {
            let listener = listen(address, port.offset())?;
            tasks.push(tokio::spawn(accept(listener, port)));
        }
        println!("ready");
        for task in tasks {
            task.await?;
        }
        anyhow::Ok(())
    })
}

fn listen(address: SocketAddr, offset: u16) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(address.ip(), address.port() + offset);
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket.listen(4096)?)
}

async fn accept(listener: TcpListener, port: Port) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(async move {
                    // The caller may go whenever it wants.
                    drop(serve(stream, port).await);
                });
            }
            Err(error) => eprintln!("accept: {error}"),
        }
    }
}

async fn serve(mut stream: TcpStream, port: Port) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match port {
        Port::Echo => {
            // Many of them are idle: no buffer before there is something to read.
            loop {
                stream.readable().await?;
                let mut buffer = [0; 16 * 1024];
                match stream.try_read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(count) => {
                        stream.write_all(buffer.get(..count).unwrap_or_default()).await?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Port::Sink => {
            let mut buffer = vec![0; 1 << 20];
            while stream.read(&mut buffer).await? > 0 {}
            Ok(())
        }
        Port::Source => {
            let buffer = vec![7; 1 << 20];
            loop {
                stream.write_all(&buffer).await?;
            }
        }
        Port::Once => {
            let mut byte = [0];
            stream.read_exact(&mut byte).await?;
            stream.write_all(&byte).await
        }
    }
}
